"""`python -m peft_elp` is the command `peft-elp`."""

import sys

from peft_elp_command import main

if __name__ == "__main__":
    sys.exit(main())
