"""Whether this process has the capability that the NVIDIA driver asks of those who change clocks."""

_CAP_SYS_ADMIN_BIT = 21


def has_sys_admin(proc_status: str) -> bool:
    """Return whether CAP_SYS_ADMIN is effective, from the text of ``/proc/self/status``.

    False when the text does not tell. True is no promise: inside a user namespace of its own (``hostUsers: false``)
    a process has the capability, yet not in the eyes of the driver. The first write tells.
    """
    for line in proc_status.splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            try:
                return bool(int(value.strip(), 16) >> _CAP_SYS_ADMIN_BIT & 1)
            except ValueError:
                return False
    return False
