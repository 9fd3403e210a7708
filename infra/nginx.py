"""`python -m infra.nginx LISTEN`: what nginx needs to send each user's requests to one of the API's processes.

Prints an `upstream` and a `server` for nginx's `http` block, from API_PROCESSES and FORERANK_API_SOCKETS. A user is
named by the header `X-Forerank-User` (the id, percent-encoded as in a path), else by the path of a prefetch, else by
the query's `user_id`; a request without a user goes to any process. Hashing is consistent: one process more or fewer
moves few users. A process that has gone is passed over where asking twice does no harm; one that is slow is waited for,
since another one would infer its users once more, and more so the more there is to do.
"""

from __future__ import annotations

import sys

from infra.settings import Settings, SettingsError, load, variable

_CONFIG = """\
map $request_uri $forerank_path_user {{
    "~^/v1/users/(?<forerank_id>[^?]+)/prefetch([?]|$)" $forerank_id;
    default "";
}}
map $arg_user_id $forerank_other_user {{
    "" $forerank_path_user;
    default $arg_user_id;
}}
map $http_x_forerank_user $forerank_user {{
    "" $forerank_other_user;
    default $http_x_forerank_user;
}}
map $forerank_user $forerank_key {{
    "" $request_id;
    default $forerank_user;
}}
upstream forerank {{
    hash $forerank_key consistent;
{servers}
    keepalive 64;
}}
server {{
    listen {listen};
    client_max_body_size 16m;
    client_body_buffer_size 256k;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $http_host;
    proxy_connect_timeout 2s;
    location / {{
        proxy_pass http://forerank;
    }}
    location ~ ^/v1/(score|prerank|recommend|users/.+/prefetch)$ {{
        proxy_pass http://forerank;
        proxy_next_upstream error non_idempotent;
        proxy_next_upstream_tries 3;
    }}
}}
"""


def config(settings: Settings, listen: str) -> str:
    """nginx's configuration. Raises SettingsError where the processes have no sockets of their own."""
    if not settings.api_sockets:
        raise SettingsError(
            f"{variable('api_sockets')} names no folder, so the processes have no sockets to choose from"
        )
    sockets = [settings.api_socket(place) for place in range(settings.api_processes)]
    servers = "\n".join(f"    server unix:{path} max_fails=0;" for path in sockets)
    return _CONFIG.format(servers=servers, listen=listen)


def main(arguments: list[str]) -> int:
    try:
        print(config(load(), arguments[0] if arguments else "8000"), end="")
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
