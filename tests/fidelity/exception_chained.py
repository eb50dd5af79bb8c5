class Mine(Exception):
    def __str__(self):
        return "mine ü"


try:
    try:
        1 / 0
    except ZeroDivisionError as error:
        raise ValueError("second") from error
except ValueError:
    error = Mine()
    error.add_note("a note")
    raise error
