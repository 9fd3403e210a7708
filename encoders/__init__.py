"""The AIF network, its training and its fold into serving form. Knows no storage and no transport."""
