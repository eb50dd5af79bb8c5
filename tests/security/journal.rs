//! One user against all through the journal, large answers and log searches.
