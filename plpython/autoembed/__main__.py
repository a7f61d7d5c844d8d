import sys

from autoembed.cli import main

sys.exit(main())
