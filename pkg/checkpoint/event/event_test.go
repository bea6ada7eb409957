package event

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// TestAppend: lines of several writers stay whole, and one that a crash has cut
// off does not take the next one along.
func TestAppend(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, FileName)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := Append(root, Event{Type: Dumped, Reason: strings.Repeat("x", 2*maxReason)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	st, err := os.Stat(path)
	if err != nil || st.Mode() != 0o600 {
		t.Fatalf("mode %v, %v", st.Mode(), err)
	}
	if err := os.Truncate(path, st.Size()-10); err != nil {
		t.Fatal(err)
	}
	if err := Append(root, Event{Type: Restored}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	types := map[Type]int{}
	for line := range strings.Lines(string(b)) {
		var e Event
		if json.Unmarshal([]byte(line), &e) == nil {
			types[e.Type]++
			if e.Time.IsZero() || len(e.Reason) > maxReason+3 {
				t.Errorf("event %.80s", line)
			}
		}
	}
	if types[Dumped] != 7 || types[Restored] != 1 {
		t.Errorf("events %v, want 7 dumped and 1 restored", types)
	}
}
