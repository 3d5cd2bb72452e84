"""Names of hosts and origins, in the one form that browsers send."""

from urllib.parse import urlsplit

from activation_beacon.errors import InputError

ANY = "*"
USUAL_PORTS = {"http": 80, "https": 443}


def host_name(text: str) -> str:
    """What a host is called, in small letters, without a port; as it is where it cannot be taken apart."""
    text = text.lower()
    if text.count(":") > 1 and not text.startswith("["):
        return text  # an address of IPv6 without a port
    try:
        return urlsplit(f"//{text}").hostname or text
    except ValueError:  # a bracket that is not closed
        return text


def origin_name(text: str) -> str:
    """An origin: scheme, host, and a port where it is not the usual one.

    Raises:
        InputError: if it is none.
    """
    if text in (ANY, "null"):  # "null" is what pages without an origin send
        return text
    try:
        parts = urlsplit(text.lower())
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    host = parts.hostname
    if not parts.scheme or not host or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
        raise InputError(
            f"An origin is scheme://host or scheme://host:port, such as https://beacon.example; got {text!r}."
        )
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port in (None, USUAL_PORTS.get(parts.scheme)) else f":{port}")
