<?php
$name = trim(fgets(STDIN));
echo "Hello $name ", array_sum(array_slice($argv, 1)), "\n";
