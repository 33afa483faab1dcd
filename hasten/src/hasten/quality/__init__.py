"""A tolerance in, a certified setting out.

`metrics` says how far an image is from the full run's; `tolerance` how far it may be; `testing` which settings keep a
tolerance, with a controlled error; `certificate` is what is kept of that; `requests` applies it, call by call.
"""
