"""`teacher-server doctor`: what would go wrong when these settings are served, and what to do about it.

    findings      what a check says, and how it is printed
    machine       software, device, memory, file descriptors
    teacher       the network, its description, a batch on the device; what fits a message and a queue
    network       addresses, ports, tokens, the collector of spans
    certificates  the server's own, and the CAs of its clients
    stores        both Redis or the embedded Valkey, the state directory, clocks

Nothing is served, written or changed. Each check is a function from settings to findings.
"""
