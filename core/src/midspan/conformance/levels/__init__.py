"""The levels of the suite, one file each: ``checks(subject)`` lists what is held against a device."""
