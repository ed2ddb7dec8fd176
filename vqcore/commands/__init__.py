"""One module per verb of the command line. A module is imported when its verb is used."""
