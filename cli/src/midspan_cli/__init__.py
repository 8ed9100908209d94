"""The command line of Midspan."""
