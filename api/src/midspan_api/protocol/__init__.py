"""What goes over the wire: request records, reply objects, events and errors."""
