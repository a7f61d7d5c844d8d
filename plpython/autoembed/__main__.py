import sys

from autoembed.command.cli import main

sys.exit(main())
