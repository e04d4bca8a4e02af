"""Names that do not show whom they stand for: hashes with a secret key, HMAC-SHA256.

A plain hash of a PatientID is undone by hashing all numbers. With a secret salt, that takes the salt.
"""

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LEAST_BYTES = 16
"""Length of a salt that nobody guesses."""
PATIENT_DIGITS, DIGITS = 10, 12
"""Hexadecimal digits of a patient, and of studies and scans."""


@dataclass(frozen=True)
class Pseudonyms:
    """Names by a secret key.

    Attributes:
        key: the salt.
    """

    key: bytes

    def of(self, kind: str, text: str, digits: int = DIGITS) -> str:
        """Return hexadecimal digits that stand for a text of some kind."""
        message = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()[:digits]

    def patient(self, patient: str) -> str:
        """Return the name of a patient; `subject_of` and BIDS know this form as a subject."""
        return f"sub-{self.of('patient', patient, PATIENT_DIGITS)}"

    @property
    def fingerprint(self) -> str:
        """Digits by which another salt is noticed."""
        return self.of("salt", "")


def default_salt_file() -> Path:
    """Return the file of the user's own salt, in the folder for settings of programs."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.environ.get("APPDATA")
    try:
        return (Path(folder) if folder else Path.home() / ".config") / "hyspark" / "import_salt"
    except RuntimeError as error:
        raise ValueError("no home folder to keep the salt of pseudonyms in; name a file by --salt_file") from error


def read_pseudonyms(salt_file: Path) -> Pseudonyms:
    """Read the salt from its file; make the file if it does not exist, readable by its owner alone.

    Raises:
        OSError: if the file cannot be made.
        ValueError: if the salt is too short.
    """
    if not salt_file.exists():
        make_salt(salt_file)
    salt = salt_file.read_bytes().strip()
    if len(salt) < LEAST_BYTES:
        raise ValueError(
            f"{salt_file}: expected a salt of at least {LEAST_BYTES} bytes, got {len(salt)}; name a file that does "
            "not exist by --salt_file, and a salt is drawn"
        )
    return Pseudonyms(salt)


def make_salt(salt_file: Path) -> None:
    """Draw a salt and write it to a file, unless another process was faster."""
    unfinished = salt_file.with_name(f".{salt_file.name}.{os.getpid()}.tmp")
    try:
        salt_file.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        try:
            os.link(unfinished, salt_file)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(unfinished, salt_file)
    except OSError as error:
        raise OSError(
            f"{salt_file}: the salt of pseudonyms is not writable ({error.strerror or error}); name another file by "
            "--salt_file"
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
