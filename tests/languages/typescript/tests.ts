import assert from 'node:assert';
import test from 'node:test';

test('sum', () => assert.strictEqual(2 + 2, FOUR, 'not FOUR'));
