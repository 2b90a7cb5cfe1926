"""Attribution methods, one to a file, all with one signature and one record each."""
