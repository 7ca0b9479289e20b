"""Certificates and keys of a federation, as docs/deploy.md makes them by openssl and ssh-keygen."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hetlora.errors import HetLoraError

__all__ = ["check_certificate", "write_certificates", "write_key"]

DAYS = 30
"""Days that the certificates are valid."""


def write_certificates(folder: Path, host: str = "localhost") -> None:
    """Write `ca.crt`, and `server.crt` with its `server.key`. The key of the authority is not written.

    Args:
        folder: An existing folder.
        host: A name by which clients reach the server, besides 127.0.0.1.
    """
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = _name("hetlora rehearsal")
    root = _certificate(issuer, issuer, authority.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    names = x509.SubjectAlternativeName([x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = (
        _certificate(_name("server"), issuer, server.public_key())
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    for file, certificate in (("ca.crt", root), ("server.crt", leaf)):
        signed = certificate.sign(authority, hashes.SHA256())
        (folder / file).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    _write_private(folder / "server.key", server, serialization.PrivateFormat.PKCS8)


def check_certificate(path: Path, host: str, now: dt.datetime | None = None) -> None:
    """Refuse a certificate with which a SuperLink would listen, and none of its runs would ever begin.

    Args:
        path: The server's certificate, in PEM.
        host: Where the SuperLink listens. Its own SuperExec connects to it there, or to this machine if it listens everywhere.
        now: The time; None for this machine's.

    Raises:
        HetLoraError: It cannot be read, is not valid now, or does not hold the address.
    """
    now = now or dt.datetime.now(dt.UTC)
    again = "make another one (docs/deploy.md, step 2)"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise HetLoraError(f"{path} is no certificate: {error}") from error
    if now > certificate.not_valid_after_utc:
        raise HetLoraError(f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {again}")
    if now < certificate.not_valid_before_utc:
        raise HetLoraError(
            f"{path} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, and here it is "
            f"{now:%Y-%m-%d %H:%M}; set the clock, or {again}"
        )
    try:
        address = ipaddress.ip_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host))  # noqa: S104  compared
    except ValueError:
        return  # a name, which may be one of a pattern
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    if address not in names.get_values_for_type(x509.IPAddress):
        kinds = x509.DNSName, x509.IPAddress
        held = ", ".join(str(name) for kind in kinds for name in names.get_values_for_type(kind))
        raise HetLoraError(
            f"{path} holds {held or 'no name'} and not {address}, by which the SuperLink's own SuperExec reaches it; add "
            f"IP:{address} to subjectAltName: {again}"
        )


def write_key(path: Path) -> None:
    """Write a client's private key, readable by its owner alone, and beside it the public one, with the suffix `.pub`."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(path, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public + b"\n")


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + dt.timedelta(days=DAYS))
    )


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    # Created with its mode, so that it is never readable by others.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
