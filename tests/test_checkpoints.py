"""Files, section 8 of dq.py.

    write_file                          test_a_file_is_whole_or_as_it_was; on a full disk: survival/test_full_disk.py
    save_checkpoint, load_checkpoint    test_checkpoints, test_a_checkpoint_runs_no_code
                                        test_a_flipped_bit_is_seen; damaged files: survival/test_broken.py
    rebuild, load_vae                   test_checkpoints
    Layout.name, written and read       test_checkpoints_of_other_orders_are_refused
"""
import shutil

import pytest
import torch

import dq
import sample
import train_transformer
from conftest import TRANSFORMER, call


def test_checkpoints(tmp_path):
    config = dq.VAEConfig(size=16, codebook_size=16)
    model = dq.DQVAE(config)
    path = tmp_path / "vae.pt"
    dq.save_checkpoint(path, "dq-vae", config, model, step=3)
    loaded = dq.load_vae(path, torch.device("cpu"))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.config == config and dq.load_checkpoint(path, "dq-vae")["step"] == 3
    for a, b in zip(model.state_dict().values(), loaded.state_dict().values()):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["vae.pt"]                # no temporary file is left
    with pytest.raises(ValueError, match="is of kind dq-vae, not dq-transformer"):
        dq.load_transformer(path, torch.device("cpu"))
    whole = path.read_bytes()
    for missing in ({"kind": "dq-vae"}, {"kind": "dq-vae", "config": {"colour": 1}, "weights": {}}):
        torch.save(missing, path)
        with pytest.raises(dq.UserError, match="corrupt or from another version"):
            dq.load_vae(path, torch.device("cpu"))
    for damage in (b"", b"hello", whole[:len(whole) // 2]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="corrupt"):
            dq.load_checkpoint(path, "dq-vae")


def test_a_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "codes.pt"
    torch.save(dict(kind="dq-codes", codes=torch.zeros(10_000)), path)
    assert dq.load_checkpoint(path, "dq-codes")["codes"].sum() == 0
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1                                                # torch.load does not check checksums
    path.write_bytes(data)
    with pytest.raises(dq.UserError, match="corrupt"):
        dq.load_checkpoint(path, "dq-codes")


def test_a_checkpoint_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))
    torch.save({"kind": "dq-vae", "weights": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        dq.load_checkpoint(tmp_path / "bad.pt", "dq-vae")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError, RuntimeError])
def test_a_file_is_whole_or_as_it_was(error, tmp_path):
    def save(file):
        file.write(b"half of a new o")
        raise error("for some reason\nand more")

    (tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else dq.UserError) as told:
        dq.write_file(tmp_path / "x.png", save)
    if error is not KeyboardInterrupt:
        assert str(told.value).startswith(f"could not write {tmp_path / 'x.png'} (for some reason); any previous file")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"] and (tmp_path / "x.png").read_bytes() == b"old"
    dq.write_file(tmp_path / "x.png", lambda file: file.write(b"new"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"] and (tmp_path / "x.png").read_bytes() == b"new"


def test_checkpoints_of_other_orders_are_refused(run, tmp_path):
    """Older checkpoints name no token order; those of tools/ablations.py name another one. Every script that reads
    them refuses them with a one-line message and leaves the files unchanged."""
    held, out = dq.load_checkpoint(run / "transformer.pt", "dq-transformer"), tmp_path / "out"
    assert held["layout"] == "coarse to fine, row by row"
    shutil.copytree(run, out)
    for layout, told in ((None, "of an older version"), ("fine to coarse", "fine to coarse")):
        torch.save({name: x for name, x in held.items() if name != "layout"} | ({"layout": layout} if layout else {}),
                   out / "transformer.pt")
        before = {path: path.read_bytes() for path in out.iterdir()}
        line = (f"error: {out / 'transformer.pt'} was trained with another token order ({told}; this version uses "
                "coarse to fine, row by row); retrain with train_transformer.py")
        assert call(sample.main, out / "transformer.pt") == line
        assert call(train_transformer.main, "--out", out, "--resume", *TRANSFORMER) == line
        assert {path: path.read_bytes() for path in out.iterdir()} == before
