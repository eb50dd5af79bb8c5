#: cold
#: env PYTHONUNBUFFERED=1 PYTHONWARNINGS=error PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/nowhere
import sys
import warnings

print(sys.flags, sys.warnoptions, sys.path[:2], sys.stdout.write_through)
warnings.warn("an error now")
