"""The graph language: builder, validation, printing, serialization, passes."""
