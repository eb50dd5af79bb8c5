const assert = require('node:assert');
const test = require('node:test');

test('sum', () => assert.strictEqual(2 + 2, FOUR, 'not FOUR'));
