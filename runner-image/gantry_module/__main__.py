from gantry_module.settings import Settings
from gantry_module.supervisor import main

if __name__ == "__main__":
    main(Settings.from_environment())
