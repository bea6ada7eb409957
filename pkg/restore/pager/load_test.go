package pager

import "testing"

func TestParseRunnable(t *testing.T) {
	for text, want := range map[string]int{
		"0.20 0.18 0.12 1/80 11206\n":   1,
		"99.9 18.0 0.12 117/8000 6\n":   117,
		"":                              -1,
		"0.20 0.18 0.12 1 11206\n":      -1,
		"0.20 0.18 0.12 x/80 11206\n":   -1,
		"0.20 0.18 0.12 1/80 11206 7\n": -1,
	} {
		got, ok := parseRunnable([]byte(text))
		if ok != (want >= 0) || ok && got != want {
			t.Errorf("%q: %d, %v", text, got, ok)
		}
	}
}

// TestCrowded: without the kernel's word it is for the caller to say.
func TestCrowded(t *testing.T) {
	l := openLoad()
	defer l.close()
	if l.crowded(1<<20, true) {
		t.Error("a million threads for each processor")
	}
	for _, unknown := range []bool{false, true} {
		if gone := (&load{fd: -1}); gone.crowded(1, unknown) != unknown {
			t.Errorf("crowded: %v, and nobody knows", !unknown)
		}
	}
}
