raise ExceptionGroup("several", [ValueError("a"), ExceptionGroup("more", [TypeError("b")])])
