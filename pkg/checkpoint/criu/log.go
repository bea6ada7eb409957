package criu

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	maxLogTail   = 1 << 20 // bytes read from the end of a log
	maxLogLine   = 512     // bytes kept of a line
	errorContext = 2       // lines kept before a line with an error
)

// LogErrors reads the end of a CRIU log and returns the lines that name an
// error, each with the two lines before it, at most maxLines of the last ones.
// The complaint about RLIMIT_NOFILE, which CRIU prints where it lacks
// CAP_SYS_RESOURCE and which changes nothing (CRIU
// criu/util.c:rlimit_unlimit_nofile), is left out. A log that is absent gives
// no lines and no error.
//
// Recorded from CRIU 4.2.1: "(00.000032) Error (criu/util.c:1534): rlimit:
// Can't setup RLIMIT_NOFILE for self: Operation not permitted".
func LogErrors(path string, maxLines int) ([]string, error) {
	f, size, err := openRegular(unix.AT_FDCWD, path, -1)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("criu log: %w", err)
	}
	defer f.Close()
	data, err := tail(f, size)
	if err != nil {
		return nil, fmt.Errorf("criu log %s: %w", path, err)
	}
	lines := bytes.Split(data, []byte("\n"))
	var out []string
	next := 0 // first line that was not yet taken
	for i, l := range lines {
		if !bytes.Contains(l, []byte("Error (")) || bytes.Contains(l, []byte("rlimit: ")) {
			continue
		}
		for ; next <= i; next++ {
			if next < i-errorContext || len(bytes.TrimSpace(lines[next])) == 0 || bytes.Contains(lines[next], []byte("rlimit: ")) {
				continue
			}
			out = append(out, printable(lines[next]))
		}
	}
	if n := len(out) - max(maxLines, 0); n > 0 {
		out = out[n:]
	}
	return out, nil
}

// tail reads the last maxLogTail bytes, from the first whole line on.
func tail(f *os.File, size int64) ([]byte, error) {
	off := max(size-maxLogTail, 0)
	data, err := io.ReadAll(io.NewSectionReader(f, off, maxLogTail))
	if err != nil {
		return nil, err
	}
	if off > 0 {
		if _, rest, ok := bytes.Cut(data, []byte("\n")); ok {
			data = rest
		}
	}
	return data, nil
}

// printable shortens a line and replaces what could upset a terminal: a
// container chooses the names of its files and processes.
func printable(l []byte) string {
	l = bytes.TrimRight(l, "\r")
	if len(l) > maxLogLine {
		l = append(bytes.Clone(l[:maxLogLine]), "..."...)
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(string(l), "?"))
}
