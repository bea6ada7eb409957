package eventlog

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

func appendEvent(t *testing.T, root, reason string) {
	t.Helper()
	if err := event.Append(root, event.Event{Type: event.Dumped, Reason: reason}); err != nil {
		t.Fatal(err)
	}
}

func appendText(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// follower polls and remembers the reasons.
type follower struct {
	*Tailer
	t   *testing.T
	got []string
}

func follow(t *testing.T, root string, all bool) *follower {
	t.Helper()
	tail, err := NewTailer(root, all)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tail.Close() })
	return &follower{Tailer: tail, t: t}
}

func (f *follower) want(reasons ...string) {
	f.t.Helper()
	f.got = nil
	if err := f.Poll(func(e event.Event) { f.got = append(f.got, e.Reason) }); err != nil {
		f.t.Fatal(err)
	}
	if !slices.Equal(f.got, reasons) {
		f.t.Errorf("got %q, want %q", f.got, reasons)
	}
}

func TestFollow(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, event.FileName)
	early := follow(t, root, false) // before there is a log
	early.want()
	appendEvent(t, root, "a")
	early.want("a")
	end, all := follow(t, root, false), follow(t, root, true)
	end.want()
	all.want("a")

	appendText(t, path, `{"type":"dumped","rea`)
	end.want()
	appendText(t, path, "son\":\"b\"}\n")
	end.want("b")

	appendText(t, path, "garbage\n\n{\"reason\":\"no type\"}\n[1]\n"+strings.Repeat("x", 3*maxLine)+"\n")
	appendEvent(t, root, "c")
	end.want("c")
	if n := end.Skipped(); n != 5 {
		t.Errorf("%d lines skipped, want 5", n)
	}
	// A line that never ends must not be kept.
	appendText(t, path, strings.Repeat("y", 4*maxLine))
	end.want()
	if len(end.partial) > maxLine {
		t.Errorf("%d bytes kept", len(end.partial))
	}
	appendText(t, path, "\n")
	appendEvent(t, root, "d")
	end.want("d")
}

func TestRotation(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, event.FileName)
	f := follow(t, root, true)
	appendEvent(t, root, "a")
	f.want("a")
	if did, err := Rotate(root, 1<<20); did || err != nil {
		t.Fatalf("rotated a small log: %v, %v", did, err)
	}
	late, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0) // a writer just before the rotation
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	appendEvent(t, root, "b")
	if did, err := Rotate(root, 10); !did || err != nil {
		t.Fatalf("not rotated: %v, %v", did, err)
	}
	f.want("b") // and there is no new log yet
	appendEvent(t, root, "d")
	f.want()
	if _, err := late.WriteString(`{"type":"dumped","reason":"c"}` + "\n"); err != nil {
		t.Fatal(err)
	}
	f.want("c", "d")
	f.want()

	// A second rotation replaces the oldest part.
	appendEvent(t, root, "e")
	if did, err := Rotate(root, 10); !did || err != nil {
		t.Fatalf("not rotated: %v, %v", did, err)
	}
	appendEvent(t, root, "f")
	f.want("e")
	f.want("f")
	var all []string
	if err := Read(root, func(e event.Event) { all = append(all, e.Reason) }); err != nil {
		t.Fatal(err)
	}
	if want := []string{"d", "e", "f"}; !slices.Equal(all, want) {
		t.Errorf("read %q, want %q", all, want)
	}
}

func TestTruncated(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, event.FileName)
	appendEvent(t, root, "a long enough reason")
	f := follow(t, root, true)
	f.want("a long enough reason")
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	f.want()
	appendEvent(t, root, "b")
	f.want("b")
}

func TestHostileLog(t *testing.T) {
	for name, make := range map[string]func(path string) error{
		"fifo":      func(path string) error { return unix.Mkfifo(path, 0o600) },
		"link":      func(path string) error { return os.Symlink("/etc/passwd", path) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if err := make(filepath.Join(root, event.FileName)); err != nil {
				t.Fatal(err)
			}
			if _, err := NewTailer(root, true); err == nil || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("error %v", err)
			}
			if err := Read(root, func(event.Event) {}); err == nil {
				t.Error("read it")
			}
		})
	}
	if err := Read(t.TempDir(), func(event.Event) { t.Error("an event of nothing") }); err != nil {
		t.Error(err)
	}
}

func FuzzTake(f *testing.F) {
	f.Add([]byte("{\"type\":\"dumped\"}\n"), 3)
	f.Add([]byte("x\n\n{\"type\":\"a\"}"), 1)
	f.Fuzz(func(t *testing.T, data []byte, cut int) {
		count := func(parts ...[]byte) (n int) {
			var tail Tailer
			for _, p := range parts {
				tail.take(p, func(event.Event) { n++ })
			}
			return n
		}
		if cut < 0 || cut > len(data) {
			cut = len(data) / 2
		}
		if whole, split := count(data), count(data[:cut], data[cut:]); whole != split {
			t.Errorf("%d events in one piece, %d in two", whole, split)
		}
	})
}
