import locale
import os
import sys

print(sys.getdefaultencoding(), sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
print(locale.getpreferredencoding(), locale.getencoding(), locale.setlocale(locale.LC_ALL, None), sys.flags.utf8_mode)
print(locale.setlocale(locale.LC_CTYPE), locale.getlocale(), locale.localeconv()["decimal_point"])
print("ü 漢字 🎉 \N{COMBINING ACUTE ACCENT}", ascii("ü"), os.fsencode("\udcff"))
try:
    print("\udcff")
except UnicodeEncodeError as error:
    print(error)
print("\udcff", file=sys.stderr)
with open("text", "w") as file:
    file.write("ü")
print(open("text", "rb").read())
