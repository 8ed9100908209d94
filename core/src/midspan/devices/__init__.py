"""Finding, choosing and opening devices."""
