package checkpoint_test

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func TestGeneration(t *testing.T) {
	dir := t.TempDir()
	seen := map[string]bool{}
	for _, id := range []string{"a", "a", "b"} {
		if err := checkpoint.NewGeneration(dir, id); err != nil {
			t.Fatal(err)
		}
		source, err := checkpoint.GenerationDir(dir, id)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(source, checkpoint.GenerationFile))
		if err != nil || !regexp.MustCompile(`^[0-9a-f]{32}\n$`).Match(b) || seen[string(b)] {
			t.Errorf("%q, %v", b, err)
		}
		seen[string(b)] = true
		for name, want := range map[string]os.FileMode{source: 0o755, filepath.Join(source, checkpoint.GenerationFile): 0o644} {
			if st, err := os.Stat(name); err != nil || st.Mode().Perm() != want {
				t.Errorf("%s: %v, %v", name, st.Mode(), err)
			}
		}
	}
	if err := checkpoint.KeepGenerations(dir, []string{"b", "c"}); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*/*")); len(left) != 1 || filepath.Base(left[0]) != "b" {
		t.Errorf("left: %v", left)
	}
	for range 2 {
		if err := checkpoint.RemoveGeneration(dir, "b"); err != nil {
			t.Error(err)
		}
	}
	if err := checkpoint.KeepGenerations(filepath.Join(dir, "none"), nil); err != nil {
		t.Error(err)
	}
	for _, id := range []string{"", ".", "..", "../x", "a/b", "a\x00"} {
		for _, err := range []error{checkpoint.NewGeneration(dir, id), checkpoint.RemoveGeneration(dir, id)} {
			if !errors.Is(err, checkpoint.ErrInvalid) {
				t.Errorf("%q: %v", id, err)
			}
		}
	}
}
