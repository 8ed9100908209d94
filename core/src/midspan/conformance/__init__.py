"""The suite that holds a device against the contract and against the reference.

``pytest --pyargs midspan.conformance --device NAME`` runs all of it, ``midspan doctor
--device NAME`` its quick part. An author subclasses nothing: checks come from what the
device claims in its ``Capabilities``, and one that is left out by hand needs a reason,
which the report shows. What may end the process (opening, closing, misuse) runs in one of
its own; to outlive a kernel that does, run the suite with ``-n 1`` of pytest-xdist.
"""
