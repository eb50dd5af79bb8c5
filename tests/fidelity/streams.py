import io
import sys

for stream in (sys.stdin, sys.stdout, sys.stderr):
    print(stream, stream.encoding, stream.errors, stream.newlines, stream.line_buffering)
    print(stream.write_through, stream.isatty(), stream.fileno(), stream.buffer, stream.buffer.raw, stream._CHUNK_SIZE)
print(sys.__stdout__ is sys.stdout, sys.__stdin__ is sys.stdin, sys.__stderr__ is sys.stderr, io.DEFAULT_BUFFER_SIZE)
print(sys.stdin.buffer.raw.closefd, sys.stdout.buffer.raw.mode, sys.stdin.seekable(), sys.stdin.buffer.raw._blksize)
