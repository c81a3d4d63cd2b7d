"""On PYTHONPATH, this blocks every connection but loopback in a process and in all that it starts (R24)."""
import ipaddress
import socket

connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def is_local(host) -> bool:
    if host in ("localhost", "", None):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse(host):
    raise OSError(f"the tests are offline: no connection to {host}")


def guarded(original):
    def call(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
            refuse(address[0])
        return original(self, address)
    return call


def local_getaddrinfo(host, *rest, **options):
    if not is_local(host.decode() if isinstance(host, bytes) else host):
        refuse(host)
    return getaddrinfo(host, *rest, **options)


socket.socket.connect, socket.socket.connect_ex = guarded(connect), guarded(connect_ex)
socket.getaddrinfo = local_getaddrinfo
