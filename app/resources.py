"""Files that ship with the package: schemas and topics, in the source tree's top level or inside an installed wheel."""

from pathlib import Path


def resource_dir(name: str) -> Path:
    """The directory ``name`` (``schemas`` or ``topics``)."""
    here = Path(__file__).resolve().parent
    packaged = here / "_resources" / name
    return packaged if packaged.is_dir() else here.parent / name
