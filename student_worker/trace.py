"""The trace that a call belongs to, as W3C Trace Context says it: https://www.w3.org/TR/trace-context/."""

import secrets
import sys

_SAMPLED = "01"  # a server that records spans shall record this one: there is nobody above us who could have said no

_NOT_SAMPLED = "00"


def trace_headers() -> tuple[str, list[tuple[str, str]]]:
    """A trace id of 32 hex digits, and the metadata that carries it.

    It is that of the span that is active where this is called, if this process uses OpenTelemetry, and a new one
    otherwise. Nothing is recorded here.
    """
    # A span can be active only where the API was imported, so it need not be looked for, nor paid for by anybody else.
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        if (context := trace.get_current_span().get_span_context()).is_valid:
            carrier: dict[str, str] = {}
            TraceContextTextMapPropagator().inject(carrier)
            return trace.format_trace_id(context.trace_id), list(carrier.items())
    trace_id = secrets.token_hex(16)
    return trace_id, [("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-{_SAMPLED}")]


def unrecorded() -> list[tuple[str, str]]:
    """The metadata of a call, again and again the same, of which nobody wants to see spans."""
    return [("traceparent", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{_NOT_SAMPLED}")]
