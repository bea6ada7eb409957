package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// addMemory commits a checkpoint whose processes' pages hold a word.
func (s *testStore) addMemory(t *testing.T, key, word string) string {
	return string(s.add(key, time.Now(), func(dir string, _ *checkpoint.Manifest) {
		pages := bytes.Repeat([]byte(word+"\x00"), 64*4096/(len(word)+1))
		for _, name := range []string{"pages-1.img", "pages-2.img", "pages-3.img"} {
			if err := os.WriteFile(filepath.Join(dir, checkpoint.ImageDir, name), pages, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}))
}

// wantCore fails unless the file is a core file with the word in memory.
func wantCore(t *testing.T, file, word string) {
	t.Helper()
	st, err := os.Stat(file)
	if err != nil || st.Mode() != 0o600 {
		t.Fatalf("core file: %v, %v", st, err)
	}
	e, err := elf.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	b, err := os.ReadFile(file)
	if err != nil || e.Type != elf.ET_CORE || bytes.Count(b, []byte(word)) < 1000 {
		t.Errorf("%s: %v, %q %d times, error %v", file, e.Type, word, bytes.Count(b, []byte(word)), err)
	}
}

func TestCore(t *testing.T) {
	s := newStore(t)
	if out := s.must("core", "--help"); !strings.Contains(out, "-o, --output string") {
		t.Errorf("help:\n%s", out)
	}
	id := s.addMemory(t, "a", "marker")
	dir := t.TempDir()
	file := filepath.Join(dir, "core")
	s.must("core", id, "--pid", "1", "-o", file)
	wantCore(t, file, "marker")
	s.fails(exitFailure, "--force", "core", id, "--pid", "1", "-o", file)
	s.must("core", id, "--pid", "7", "-o", file, "--force")
	s.must("verify", id) // nothing was changed

	archive := filepath.Join(dir, "a.tar")
	s.must("export", id, archive)
	ofArchive := filepath.Join(dir, "core.archive")
	s.must("core", archive, "--pid", "7", "-o", ofArchive)
	wantCore(t, ofArchive, "marker")
	a, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(ofArchive); err != nil || !bytes.Equal(a, b) {
		t.Errorf("the core file of the archive differs; %v", err)
	}

	all := filepath.Join(dir, "all")
	s.must("core", archive, "--all", "-d", all)
	entries, err := os.ReadDir(all)
	if err != nil || len(entries) != 2 {
		t.Fatalf("%v, %v; want core.1 and core.7, as 8 is a zombie", entries, err)
	}
	wantCore(t, filepath.Join(all, "core.1"), "marker")
	wantCore(t, filepath.Join(all, "core.7"), "marker")

	none := filepath.Join(dir, "none")
	for name, tc := range map[string]struct {
		code int
		part string
		args []string
	}{
		"no such checkpoint": {exitNotFound, "no such checkpoint", []string{"ffff", "--pid", "1", "-o", none}},
		"no such process":    {exitNotFound, "no process 9", []string{id, "--pid", "9", "-o", none}},
		"zombie":             {exitFailure, "zombie", []string{id, "--pid", "8", "-o", none}},
		"no such archive":    {exitFailure, "no such file", []string{"./ffff", "--pid", "1", "-o", none}},
		"no archive":         {exitFailure, "archive:", []string{file, "--pid", "1", "-o", none}},
		"too large":          {exitFailure, "--max-bytes", []string{archive, "--pid", "1", "-o", none, "--max-bytes", "4096"}},
		"neither":            {exitUsage, "either", []string{id}},
		"no file":            {exitUsage, "either", []string{id, "--pid", "1"}},
		"both":               {exitUsage, "either", []string{id, "--pid", "1", "-o", none, "--all"}},
		"no directory":       {exitUsage, "either", []string{id, "--all"}},
		"negative":           {exitUsage, "pid", []string{id, "--pid", "-1", "-o", none}},
		"nowhere":            {exitFailure, "no such file", []string{id, "--pid", "1", "-o", dir + "/x/y"}},
	} {
		t.Run(name, func(t *testing.T) {
			(&testStore{s.Store, t}).fails(tc.code, tc.part, append([]string{"core"}, tc.args...)...)
		})
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if _, err := os.Lstat(none); err == nil {
		t.Error("a core file in spite of the error")
	}
}

func TestCoreOfHostileArchive(t *testing.T) {
	s := newStore(t)
	for name, tc := range map[string]struct {
		headers []tar.Header
		part    string
	}{
		"empty":     {nil, "no checkpoint/inventory.img"},
		"link":      {[]tar.Header{{Typeflag: tar.TypeSymlink, Name: "checkpoint/core-1.img", Linkname: "/etc/shadow"}}, "want a regular file"},
		"hard link": {[]tar.Header{{Typeflag: tar.TypeLink, Name: "checkpoint/core-1.img", Linkname: "/etc/shadow"}}, "want a regular file"},
		"twice":     {[]tar.Header{{Typeflag: tar.TypeReg, Name: "checkpoint/core-1.img"}, {Typeflag: tar.TypeReg, Name: "./checkpoint/core-1.img"}}, "twice"},
		"outside":   {[]tar.Header{{Typeflag: tar.TypeReg, Name: "checkpoint/../../core-1.img"}, {Typeflag: tar.TypeReg, Name: "/checkpoint/inventory.img"}}, "no checkpoint/inventory.img"},
		"no images": {[]tar.Header{{Typeflag: tar.TypeReg, Name: "checkpoint/inventory.img"}}, "corrupt"},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			for _, h := range tc.headers {
				if err := w.WriteHeader(&h); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			archive := filepath.Join(dir, "x.tar")
			if err := os.WriteFile(archive, b.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			(&testStore{s.Store, t}).fails(exitFailure, tc.part, "core", archive, "--pid", "1", "-o", filepath.Join(dir, "core"))
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
				t.Errorf("left behind: %v, %v", entries, err)
			}
		})
	}
}
