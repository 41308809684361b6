"""A page of plain prose, read by `kv-diagnose` when no text is given."""

TEXT = """\
The ferry left the north pier a little after six, later than the board had promised and earlier than anyone who knew
the captain would have guessed. Ana stood at the rail with her collar up and watched the town shrink: first the boats,
then the warehouses with their rows of broken windows, then the church, which from the water looked no larger than a
chess piece. She had lived there for thirty-one years and had never once seen it from this side.

Below deck a man was explaining to two students how tides are computed. "Take the height at the harbour every hour for
a year," he said, "and write it as a sum of waves. The moon gives one with a period of twelve hours and twenty-five
minutes, the sun another of twelve hours, and there are thirty-five more that matter. Each wave has an amplitude and a
phase, and once you have those numbers you can print the table for the next century." One student wrote this down. The
other asked what happens when the wind blows from the west for three days. The man laughed. "Then," he said, "the
table is wrong, and you had better ask a fisherman."

At half past seven the lights of the island came up. Ana counted them as she had counted steps, coins and tiles when
she was a child: nine on the quay, four along the road, one by itself on the hill, which must be the house. In her bag
were a letter of two pages, a key, a list of repairs (roof, well, east wall, stove), and 1,250 euros in an envelope
marked "roof". It would not be enough. It was, however, a beginning; and she had noticed that people who waited until
they had enough were, for the most part, still standing on the pier.
"""
