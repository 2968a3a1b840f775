"""The first half hour on a GPU: six commands of under nine minutes each, complete by themselves. See README.md beside this."""
