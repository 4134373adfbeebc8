"""Certificates and keys: by which clients know their center, and the center who may join.

The center has an authority of its own, whose certificate it gives to those who join, and they give it the public halves
of their keys. Private halves are never sent. Keys are in OpenSSH's format, as Flower takes them.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import re
from pathlib import Path
from typing import Any, Final

from mixofshow.errors import BadInputError, nearest, shown
from mixofshow.outputs import writing
from mixofshow.reading import read_bytes

TLS: Final = "tls"
MEMBERS: Final = "members"
AUTHORITY: Final = "ca.pem"
YEARS: Final = 10
MAX_KEY_BYTES: Final = 16_384
NODE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
HOST_NAME: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?)*")
LOCAL: Final = ("localhost", "127.0.0.1")
"""Names under which the center's own programs reach it."""


def make_tls(folder: Path, hosts: list[str]) -> None:
    """Make an authority and the center's certificate for these host names and addresses, in `folder`/tls.

    What is there stays: clients have that authority. Raises BadInputError where it is there for other hosts, or for
    what is none, ResourceError.
    """
    place, wanted = folder / TLS, sorted({*map(checked_host, hosts), *LOCAL})
    if (place / "server.pem").exists():
        if missing := sorted(set(wanted) - set(_hosts_of(place / "server.pem"))):
            raise BadInputError(
                f"{place}: its certificate is not for {shown(', '.join(missing))}; remove server.pem and server.key to "
                "have a new one (clients keep ca.pem)"
            )
        return
    ca_key, ca = _authority(place)
    key = _new_key()
    certificate = _signed(_subject("mixofshow center"), key.public_key(), ca.subject, ca_key, hosts=wanted)
    _write(place / "server.key", _private_pem(key), private=True)
    _write(place / "server.pem", _pem(certificate))


def _authority(place: Path) -> tuple[Any, Any]:
    """Key and certificate of the center's own authority, made if they are not there."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    if not (place / AUTHORITY).exists():
        key = _new_key()
        name = _subject("mixofshow authority")
        _write(place / "ca.key", _private_pem(key), private=True)
        _write(place / AUTHORITY, _pem(_signed(name, key.public_key(), name, key, hosts=None)))
    try:
        key = serialization.load_pem_private_key(read_bytes(place / "ca.key", MAX_KEY_BYTES, BadInputError), None)
        return key, x509.load_pem_x509_certificate(read_bytes(place / AUTHORITY, MAX_KEY_BYTES, BadInputError))
    except ValueError as error:
        raise BadInputError(f"{place}: not a certificate and its key ({shown(error)}); restore both") from error


def make_node_key(path: Path) -> str:
    """Make a client's key unless it is there, and return its public half, in one line. Raises BadInputError."""
    from cryptography.hazmat.primitives import serialization

    if not path.exists():
        form = serialization.PrivateFormat.OpenSSH
        _write(path, _new_key().private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()), True)
    try:
        private = serialization.load_ssh_private_key(read_bytes(path, MAX_KEY_BYTES, BadInputError), None)
    except ValueError as error:
        raise BadInputError(f"{path}: not a private key ({shown(error)}); remove it to have a new one") from error
    form = serialization.PublicFormat.OpenSSH
    line: str = private.public_key().public_bytes(serialization.Encoding.OpenSSH, form).decode()
    return line


def admit(folder: Path, name: str, line: str) -> Path:
    """Enter a client's public key into the list of those who may join. Raises BadInputError."""
    if not NODE_NAME.fullmatch(name):
        raise BadInputError(f"'{shown(name)}': expected a name of small letters, digits, - and _, at most 32")
    public_key(line, f"<{name}>")
    path = folder / MEMBERS / f"{name}.pub"
    if path.exists() and path.read_text().split()[:2] != line.split()[:2]:
        raise BadInputError(f"{path}: another key has this name; expel it first, or choose another name")
    others = {one.stem: one.read_text().split()[:2] for one in path.parent.glob("*.pub") if one != path}
    if twins := [one for one, key in others.items() if key == line.split()[:2]]:
        raise BadInputError(f"<{name}>: this key is that of {twins[0]} already")
    _write(path, line.strip().encode() + b"\n")
    return path


def expel(folder: Path, name: str) -> None:
    """Strike a client from the list. Raises BadInputError for one that is not on it."""
    path = folder / MEMBERS / f"{name}.pub"
    known = [one.stem for one in path.parent.glob("*.pub")]
    if name not in known:
        raise BadInputError(f"no member is called '{shown(name)}'{nearest(name, known)}")
    path.unlink()


def members(folder: Path) -> dict[str, bytes]:
    """Those who may join: their public keys, in PEM as Flower registers them, by name. Raises BadInputError."""
    files = sorted((folder / MEMBERS).glob("*.pub"))
    lines = {file.stem: read_bytes(file, MAX_KEY_BYTES, BadInputError).decode(errors="replace") for file in files}
    return {name: public_key(line, f"{folder / MEMBERS / name}.pub") for name, line in lines.items()}


def public_key(line: str, name: str) -> bytes:
    """A key as OpenSSH writes it, in PEM. Raises BadInputError, which calls it by `name`, for any other kind."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInputError(f"{name}: not a public key as `mixofshow join` prints it ({shown(error)})") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BadInputError(f"{name}: expected a key of an elliptic curve (ecdsa-sha2-nistp384)")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    made: bytes = key.public_bytes(serialization.Encoding.PEM, form)
    return made


def _new_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _subject(name: str) -> Any:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _signed(subject: Any, key: Any, issuer: Any, issuer_key: Any, *, hosts: list[str] | None) -> Any:
    """A certificate of `key`, for hosts or, without, of an authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(ca=hosts is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(_usage(authority=hosts is None), critical=True)
    )
    if hosts is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(one) for one in hosts]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _usage(*, authority: bool) -> Any:
    from cryptography import x509

    kinds = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    none = dict.fromkeys((*kinds, "decipher_only"), False)
    return x509.KeyUsage(digital_signature=True, key_cert_sign=authority, crl_sign=authority, **none)


def checked_host(name: str) -> str:
    """A host name or address. Raises BadInputError for what is none."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    if not HOST_NAME.fullmatch(name):
        raise BadInputError(
            f"'{shown(name)}': expected a name or address of a machine, without a port: center.example or 192.168.1.20"
        )
    return name


def _host(name: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _hosts_of(path: Path) -> list[str]:
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(read_bytes(path, MAX_KEY_BYTES, BadInputError))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise BadInputError(f"{path}: not a certificate of this program ({shown(error)})") from error
    return [str(one.value) for one in names]


def _pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    made: bytes = certificate.public_bytes(serialization.Encoding.PEM)
    return made


def _private_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PrivateFormat.PKCS8
    made: bytes = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return made


def _write(path: Path, data: bytes, private: bool = False) -> None:
    """Write a file whole; a private one is never readable by others, not even while it is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        temporary.write_bytes(data)
        if private:
            temporary.chmod(0o600)
