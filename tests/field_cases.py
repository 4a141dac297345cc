"""What must hold for each field of `DPOKConfig`: a function for each, registered by name. test_fields.py runs them."""

CASES = {}


def case(*names):
    def register(function):
        CASES.update(dict.fromkeys(names, function))
        return function

    return register
