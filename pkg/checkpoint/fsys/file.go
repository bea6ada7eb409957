package fsys

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// ErrTooLarge is what ReadFile fails with for a file beyond its limit.
var ErrTooLarge = errors.New("file is too large")

// ReadFile reads a regular file of at most limit bytes, following no link.
func ReadFile(files FS, path string, limit int64) ([]byte, error) {
	f, err := files.Open(path)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	err = errors.Join(err, f.Close())
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s: more than %d bytes: %w", path, limit, ErrTooLarge)
	}
	return data, err
}

// WriteFile makes a new file of mode 0600 and its content durable, but not yet
// its name. It fails with fs.ErrExist where anything has that name; after
// another error there is no such file.
func WriteFile(files FS, path string, data []byte) error {
	f, err := files.Create(path, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, files.Remove(path))
	}
	return nil
}

// Replace writes a file of mode 0600 that others read as a whole or not at all, and
// makes its directory, of mode 0700, where there is none. It is for what need not
// survive the node: nothing is synced.
func Replace(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		if err = os.Rename(f.Name(), path); err == nil {
			return nil
		}
	}
	return errors.Join(err, os.Remove(f.Name()))
}
