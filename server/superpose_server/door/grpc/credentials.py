"""TLS as gRPC takes it."""

from __future__ import annotations

import grpc

from superpose_server.door.tls import Identity, Tls


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Return credentials that follow `tls`: gRPC asks for them at the beginning of a handshake."""
    shown = tls.identity()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        now = tls.identity()
        if now is shown:
            return None  # Nothing to read again.
        shown = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown),
        renewed,  # type: ignore[arg-type]  # None is allowed, which the types do not know
        require_client_authentication=tls.asks_clients,
    )


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(identity.key, identity.chain)], identity.client_ca
    )
