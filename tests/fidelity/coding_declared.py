# -*- coding: latin-1 -*-
print("ü", len("ü"))
print(open(__file__, encoding="utf-8").read().splitlines()[-1])
