import sqlite3

with sqlite3.connect(":memory:") as connection:
    connection.execute("create table t(a, b)")
    connection.executemany("insert into t values (?, ?)", [(1, "x"), (2, "ü")])
    print(connection.execute("select * from t order by a desc").fetchall())
connection.execute("select nothing")
