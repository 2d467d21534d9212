"""The report of one or several training runs: a page with charts and responses, made from the files of the runs."""
