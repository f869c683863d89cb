"""A file appears whole or not at all, with the permissions it should have."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcad_mlx.files import new_file, write_text


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("before", ["old", None])
def test_a_write_that_is_broken_off_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], before: str | None
) -> None:
    file = tmp_path / "a.json"
    if before is not None:
        file.write_text(before)
    with pytest.raises(error), new_file(file) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        assert temporary.suffix == ".json"
        raise error
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if before is None else [before])


def test_permissions_are_those_of_the_file_before_or_of_any_new_file(tmp_path: Path) -> None:
    ordinary, file, secret = (tmp_path / name for name in ("ordinary", "new/file", "secret"))
    ordinary.touch()
    write_text(file, "new")
    assert (file.read_text(), file.stat().st_mode) == ("new", ordinary.stat().st_mode)
    file.chmod(0o604)
    write_text(file, "newer")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("newer", 0o604)
    secret.touch(0o644)
    with new_file(secret, private=True):
        pass
    assert secret.stat().st_mode & 0o777 == 0o600
