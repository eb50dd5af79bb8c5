"""Serves one Python module over gRPC. Started by `python3 -m gantry_module`; module_service.proto is the contract.

Three kinds of processes: the *supervisor* holds the port and never imports the module; the *nursery* imports it once and
forks *workers*; a worker takes one call at a time over a socket. Whatever a call does to its worker, the next call finds
another one that is ready.
"""
