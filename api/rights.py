"""Who may change what is served: the callers that bear the admin token (infra/admin.py)."""

from __future__ import annotations

import hmac

from api.problems import ProblemError


class Rights:
    """Compares what callers bear with the token, in a time that does not tell how much of it was right."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def check(self, authorization: str | None) -> None:
        """`authorization`: the header of that name. Raises ProblemError 401."""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise ProblemError(401, "unauthorized", "this changes what is served: send `Authorization: Bearer <token>`")
        if not hmac.compare_digest(given.strip().encode(), self._token):
            raise ProblemError(401, "unauthorized", "the token is not the one of this host")
