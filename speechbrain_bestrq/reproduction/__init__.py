"""The paper in one command: a plan of the recipes' own runs, what runs it, and the tables that come out."""
