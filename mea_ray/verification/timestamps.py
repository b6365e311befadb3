"""Time stamps of RFC 3161: a time-stamp authority signs that a hash existed at a time."""

from __future__ import annotations

import contextlib
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from cryptography import x509
from rfc3161_client import (
    HashAlgorithm,
    SignedData,
    TimestampRequestBuilder,
    VerificationError,
    VerifierBuilder,
    decode_timestamp_response,
)

from mea_ray.core.errors import ArtifactError, ConfigError

MOST_BYTES = 1 << 20
"""Maximum size of an authority's reply, in bytes."""
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class TimeStamp:
    """A time stamp whose signature was checked.

    Attributes:
        time: When the authority signed the hash, UTC.
        authority: Name of the authority, from the certificate that signed.
    """

    time: datetime
    authority: str


def make_request(content: bytes) -> bytes:
    """Return a time-stamp request (DER) for the SHA-256 of ``content``, which asks for the authority's certificate."""
    builder = TimestampRequestBuilder().data(content).hash_algorithm(HashAlgorithm.SHA256)
    return builder.nonce(nonce=True).cert_request(cert_request=True).build().as_bytes()


def ask_authority(url: str, request: bytes) -> bytes:
    """Send a request to an authority over HTTP and return its reply (DER).

    Raises:
        ConfigError: The URL is not an HTTP URL, or the authority cannot be reached or refuses.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--tsa {url} must be a URL that begins with http:// or https://")
    headers = {"Content-Type": "application/timestamp-query", "Accept": "application/timestamp-reply"}
    try:
        asked = urllib.request.Request(url, data=request, headers=headers, method="POST")
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as reply:
            content: bytes = reply.read(MOST_BYTES + 1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ConfigError(
            f"the time-stamp authority {url} did not answer ({error}); try again, or send the request file yourself "
            "and pass the reply with --reply"
        ) from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{url} sent more than {MOST_BYTES:,} bytes, which is not a time stamp; check the address")
    return content


def read_roots(pem: bytes | None) -> list[x509.Certificate]:
    """Return the certificates of authorities that are trusted.

    Args:
        pem: Certificates in PEM; None takes those that this system trusts.

    Raises:
        ConfigError: There is no certificate in ``pem``.
    """
    if pem is None:
        return _of_this_system()
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(
            f"--roots: no certificates in PEM ({error}); give the authority's root certificate"
        ) from error


def _of_this_system() -> list[x509.Certificate]:
    certificates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some old roots have serial numbers that today's rules forbid
        for encoded in ssl.create_default_context().get_ca_certs(binary_form=True):
            with contextlib.suppress(ValueError):
                certificates.append(x509.load_der_x509_certificate(encoded))
    return certificates


def check_reply(reply: bytes, content: bytes, roots: Sequence[x509.Certificate]) -> TimeStamp:
    """Check that an authority has stamped ``content``.

    Args:
        reply: The authority's reply, DER.
        content: What was hashed for the request.
        roots: Certificates that are trusted. They only need to be valid at the time of the stamp.

    Raises:
        ArtifactError: It is not a time stamp, the authority refused, the signature or its certificates are not valid,
            or the stamp is of something else.
    """
    try:
        decoded = decode_timestamp_response(reply)
    except ValueError as error:
        raise ArtifactError(f"this is not a reply of a time-stamp authority ({error}); request it again") from error
    if not roots:
        raise ArtifactError("no certificates are trusted on this system; give the authority's root with --roots")
    builder = VerifierBuilder(roots=list(roots))
    try:
        builder.build().verify_message(decoded, content)
    except (VerificationError, ValueError) as error:
        raise ArtifactError(
            f"the time stamp does not hold: {error}; it must be of this very commitment, signed by an authority whose "
            "root certificate is given with --roots or trusted by this system"
        ) from error
    return TimeStamp(decoded.tst_info.gen_time.astimezone(timezone.utc), _signer(decoded.signed_data))


def _signer(signed: SignedData) -> str:
    """Return the subject of the certificate that signed, or its issuer where the reply does not hold it."""
    (signer,) = signed.signer_infos
    for encoded in signed.certificates:
        certificate = x509.load_der_x509_certificate(encoded)
        if (certificate.issuer, certificate.serial_number) == (signer.issuer, signer.serial_number):
            return str(certificate.subject.rfc4514_string())
    return str(signer.issuer.rfc4514_string())
